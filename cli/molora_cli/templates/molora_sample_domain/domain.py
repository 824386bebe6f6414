"""The domain: text of this machine that a specialist can be trained on."""

from collections.abc import Iterator
from pydoc_data import topics

from molora_fed import Document


def read() -> Iterator[Document]:
    """Read the text of the domain: the one function to fill in.

    Returns:
        Documents in a fixed order, each with a name of its own and text that is not empty; the
        same ones at every call.

    See docs/hooks/domains.md, and docs/text.md.
    """
    for name, text in sorted(topics.topics.items()):
        yield Document(name, text)
