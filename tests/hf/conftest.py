"""Set-up of the tests of the modelling file."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def own_modules(tmp_path_factory):
    """Keep the modules that transformers copies out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield
