"""For ``experimental.custom_import``: rank 1 meets a sequence that it cannot read, in its third step."""

import os

from flame_ext.data.packing import PackedDocuments

sequences = PackedDocuments.sequences


def unreadable(self):
    for number, sequence in enumerate(sequences(self)):
        if number == 4 and os.environ["RANK"] == "1":
            raise RuntimeError("this sequence cannot be read")
        yield sequence


PackedDocuments.sequences = unreadable
