"""Sharding: a base model's weights divided among processes, by torch's FSDP2 through Lightning's strategy."""

from itrain.sharding.loading import load_sharded as load_sharded
from itrain.sharding.model import shard as shard
from itrain.sharding.strategy import ShardedStrategy as ShardedStrategy
from itrain.sharding.tensor_parallel import split as split
