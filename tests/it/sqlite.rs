//! What is particular to SQLite: one file, shared with its application.

mod locks;
mod relays;
