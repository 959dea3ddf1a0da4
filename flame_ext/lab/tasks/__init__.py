"""The tasks by the name of their kind."""

from flame_ext.lab.tasks.countdown import Countdown
from flame_ext.lab.tasks.creativity import Siblings, Triangles
from flame_ext.lab.tasks.global_constraint import GlobalConstraint
from flame_ext.lab.tasks.path_star import PathStar
from flame_ext.lab.tasks.task import Task
from flame_ext.lab.tasks.text import Text

KINDS: dict[str, type[Task]] = {
    "path_star": PathStar,
    "siblings": Siblings,
    "triangles": Triangles,
    "global_constraint": GlobalConstraint,
    "countdown": Countdown,
    "text": Text,
}
