"""For ``experimental.custom_import``: no file may become larger than 1 MB, as on a disk that is full."""

import resource

resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
