"""For ``experimental.custom_import``: the data of rank 1 end inside the accumulation window of its fourth step."""

import os
from itertools import islice

from flame_ext.data.loader import PackedDataloader

if os.environ["RANK"] == "1":
    endless = PackedDataloader.__iter__
    PackedDataloader.__iter__ = lambda self: islice(endless(self), 7)
