//! JSON-RPC traits, one per namespace, with their data and error codes.
