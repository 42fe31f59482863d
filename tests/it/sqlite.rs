//! What is particular to SQLite: one file, shared with its application.

mod arrival;
mod commands;
mod content;
mod disk;
mod locks;
mod relays;
