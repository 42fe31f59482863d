//! The binary `relay`; see [`outbox_relay::cli`].

fn main() -> std::process::ExitCode {
    outbox_relay::cli::main()
}
