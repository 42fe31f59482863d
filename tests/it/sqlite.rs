//! What is particular to SQLite: one file, shared with its application.

mod commands;
mod content;
mod locks;
mod relays;
