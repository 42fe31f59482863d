//! What is particular to SQLite: one file, shared with its application.

mod content;
mod locks;
mod relays;
