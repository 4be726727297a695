"""What people start: the command line, the demo, the doctor, the registry of models, and the web apps.

commands/ holds one subcommand a file; guard/, chat/ and label/ are the larger ones; web/ is what the pages share.
"""

from plumbline.lazy import exports

__all__, __getattr__, __dir__ = exports(
    __name__,
    {
        "Registry": "registry",
    },
)
