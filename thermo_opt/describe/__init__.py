"""An audit in words: the names, units and meanings of its quantities, and plain sentences about
them."""
