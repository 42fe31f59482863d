//! What applications, operators, servers and platforms really do, and what the relay makes of it.

mod additions;
mod blame;
mod crash;
mod days;
mod file;
mod hostile;
mod identity;
mod logs;
mod pinned;
mod process;
mod set_ups;
mod settle;
mod sizes;
mod versions;
mod views;
mod words;
