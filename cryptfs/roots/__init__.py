"""Where root keys come from: one module per kind of protector, each a `RootProvider` (ports), none knowing another."""
