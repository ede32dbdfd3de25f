"""Networks of other projects' formats."""

from tvmatch.interop.checkpoints.authors import expect_dit, network_from_authors, network_to_authors
from tvmatch.interop.checkpoints.snapshot import import_network, read_snapshot

__all__ = ["expect_dit", "import_network", "network_from_authors", "network_to_authors", "read_snapshot"]
