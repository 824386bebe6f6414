"""The domain: text of this machine that a specialist can be trained on."""

from collections.abc import Iterator
from pydoc_data import topics

from molora_fed import Configurable, Document, PluginOptions


class SampleOptions(PluginOptions):
    """Options, which a contributor sets with --domain-option; they are sent to nobody.

    Attributes:
        shortest: Characters that a document has at least.
    """

    shortest: int = 1


class SampleDomain(Configurable[SampleOptions]):
    """What Python's own documentation says of its statements."""

    def __call__(self) -> Iterator[Document]:
        """Read the text of the domain: the one method to fill in.

        A document is never cut between training and measuring: make one of what belongs together,
        a letter or a chapter, and many of them.

        Returns:
            Documents in a fixed order, each with a name of its own and text that is not empty;
            the same ones at every call.

        See docs/hooks/domains.md, and docs/text.md.
        """
        for name, text in sorted(topics.topics.items()):
            if len(text) >= self.options.shortest:
                yield Document(name, text)
