"""The open ends of the library: what you can add from outside, without an edit of it. `docs/extend.md` has the tutorials.

Each function here registers one thing for the running process; call it before the verb that needs it.
"""

from __future__ import annotations
