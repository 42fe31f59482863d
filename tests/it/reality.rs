//! What applications, operators, servers and platforms really do, and what the relay makes of it.

mod file;
mod process;
mod versions;
