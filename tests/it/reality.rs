//! What applications, operators, servers and platforms really do, and what the relay makes of it.

mod process;
mod versions;
