"""Images that clients have sent under a name, so that later requests need only name them."""

from collections import OrderedDict
from dataclasses import dataclass

MAX_BYTES, MAX_COUNT = 256 << 20, 4096  # of all that are kept


@dataclass(frozen=True)
class ImageFile:
    """What a client has sent. digest: of `content`. is_embeds: whether it holds embeddings, not a picture."""

    content: bytes
    digest: bytes
    is_embeds: bool


class NamedImages:
    """(owner, name) -> file; where there is no more room, those that were not used for longest go.

    An owner is whoever sends the same API key: nobody finds what others have named.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, max_count: int = MAX_COUNT):
        self._max_bytes, self._max_count = max_bytes, max_count
        self._bytes = 0
        self._files: OrderedDict[tuple[str, str], ImageFile] = OrderedDict()

    def get(self, owner: str, name: str) -> ImageFile | None:
        if (found := self._files.get((owner, name))) is not None:
            self._files.move_to_end((owner, name))
        return found

    def put(self, owner: str, name: str, file: ImageFile) -> None:
        """From now on the name stands for this file. One that is larger than all the room there is is not kept."""
        if (old := self._files.pop((owner, name), None)) is not None:
            self._bytes -= len(old.content)
        self._files[owner, name] = file
        self._bytes += len(file.content)
        while self._bytes > self._max_bytes or len(self._files) > self._max_count:
            self._bytes -= len(self._files.popitem(last=False)[1].content)
