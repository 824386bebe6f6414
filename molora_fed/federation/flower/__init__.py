"""The only place that uses what Flower keeps for itself; all of it holds for one version.

Flower's own SuperLink serves, on one port, an interface that runs code for whoever reaches it. So
none of its programs is started here: `link` serves the fleet's interface alone and carries mail in
the same process, `node` answers it with the installed package, whatever a server would have it
run, and neither knows an app that was sent. `simulated` does the same for nodes of Ray.
"""

FLOWER_VERSION = "1.41.0"
"""The version whose internals are used; a test fails with another, see docs/federation.md."""
