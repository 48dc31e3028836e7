"""Texts as Python has them, and as files can hold them."""


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can encode a text.

    It cannot if the text has half of a surrogate pair, which JSON can escape, and with which Python
    stands for the bytes of a command line that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
