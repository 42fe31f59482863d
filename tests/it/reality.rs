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
mod locks;
mod logs;
mod migration;
mod once;
mod pinned;
mod pooled;
mod process;
mod replication;
mod row_security;
mod set_ups;
mod settle;
mod sizes;
mod triggers;
mod versions;
mod views;
mod wakeup;
mod words;
