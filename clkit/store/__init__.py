"""What is kept on disk: files that are whole or absent, records under hashes, and what tells two computations apart."""

from clkit.store.files import (
    attempt, cache_root, canonical, content, dense, digest, expand, hash_tensor, intact, load_tensors, plain,
    read_json, read_tree, regular, save_tensors, writable, write_atomically, write_json, write_text, write_tree,
)  # fmt: skip
from clkit.store.identity import describe, differences, local_modules, source_digest
from clkit.store.files import Records
