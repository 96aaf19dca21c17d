"""The open ends of the library: what can be added from outside without an edit of it; tutorials in `docs/extend/`.

Each function here registers one thing for the running process; call it before the verb that needs it.
"""

from __future__ import annotations
