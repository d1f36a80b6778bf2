"""Methods that choose visual tokens, or weighted sums of them, for the language model: one method, one file.

The environment variable FOVEATE_REDUCERS names more folders of such files, separated as in PATH. So an operator can try
a method without a change to this folder. A file here wins over a file of the same name there.
"""

import os

__path__ += [folder for folder in os.environ.get("FOVEATE_REDUCERS", "").split(os.pathsep) if folder]
