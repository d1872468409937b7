from .losses import *
from .scores import *
from .selection import *
from .variance import *
from .callback.core import *
from .callback.importance import *
from .callback.filter import *
from .data import *
