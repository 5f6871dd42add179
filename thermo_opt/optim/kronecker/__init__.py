"""The Kronecker-factored metric in training: running K-FAC and EKFAC (theory §7)."""
