"""Nothing lost, nothing stuck, nothing twice: every interleaving of the processes of one key (docs/exploration.md).

``explorer.py`` searches a graph of states, ``system.py`` says what may happen in one, ``processes.py`` what a process
does next (the package's own code, stopped before each effect), ``snapshots.py`` what a script makes of the store (the
package's own scripts, on an embedded server), ``checks.py`` what must be true. ``protocol.pml`` is a specification of
the same protocol, for spin.
"""
