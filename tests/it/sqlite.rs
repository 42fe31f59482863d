//! What only SQLite has: one file, which the application uses too.

mod arrival;
mod commands;
mod content;
mod disk;
mod locks;
mod relays;
