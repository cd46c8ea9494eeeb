"""A node that sorts shards of an object store, in a process that Ray starts.

In: the name of a shard. Out: what became of its objects.
"""

from sorter.cluster.node import Description, Node, Progress, Setup
from sorter.cluster.shard_sorter import Result, ShardSorter
from sorter.cluster.stores import open_store


class ObjectNode(Node):
    """One node of a job. Ray calls its methods from several threads; `begin` comes first."""

    _sorter: ShardSorter

    def begin(self, given: Setup) -> Description:
        """Load the model, and open the buckets.

        Raises:
            SorterError: this machine is not set up as the one that the command runs on.
        """
        description = super().begin(given)
        assert given.place is not None, "the job says where its objects are"
        inbox, output = (open_store(url)[0] for url in (given.place.inbox, given.place.output))
        self._sorter = ShardSorter(self._decider, self._settings, given.place, inbox, output)
        return description

    def progress(self) -> Progress:
        """How far it is: a node that only moves what was decided before is at work as well."""
        return Progress(self._decider.decided, self._sorter.moved)

    def sort_shard(self, name: str) -> Result:
        """Decide on a shard, unless somebody has, and move its objects.

        Raises:
            StoreError: the store does not answer; the shard is to be done again.
        """
        return self._sorter.sort(name)

    def close(self) -> None:
        """End the decoders and remove the scratch folder."""
        super().close()
        self._sorter.close()
