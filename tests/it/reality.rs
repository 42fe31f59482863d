//! What applications, operators, servers and platforms really do, and what the relay makes of it.

mod file;
mod hostile;
mod pinned;
mod process;
mod set_ups;
mod versions;
mod views;
