"""The measurements that the README quotes: operations, steps, noise draws and the loader, each beside its rivals."""
