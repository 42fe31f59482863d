//! What applications, operators, servers and platforms really do, and what the relay makes of it.

mod additions;
mod blame;
mod bounds;
mod crash;
mod days;
mod file;
mod formats;
mod hostile;
mod identity;
mod logs;
mod migration;
mod pinned;
mod process;
mod replication;
mod set_ups;
mod settle;
mod sizes;
mod triggers;
mod versions;
mod views;
mod words;
