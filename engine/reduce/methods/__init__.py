"""Which visual tokens, or which weighted sums of them, enter the language model: one method, one file.

FOVEATE_REDUCERS in the environment names more folders of such files, separated as in PATH, so that whoever runs the
server can try a method without changing this one. A file here wins over one of the same name there.
"""

import os

__path__ += [folder for folder in os.environ.get("FOVEATE_REDUCERS", "").split(os.pathsep) if folder]
