"""The theory on problems whose answers are known: closed forms, flows, geodesics, and claims that
are checked."""
