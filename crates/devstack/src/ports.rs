//! Free ports on 127.0.0.1.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, TcpListener},
    sync::{Mutex, PoisonError},
};

/// Ports that this process has given away: a server that restarts finds its own free again.
static TAKEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());

/// A free port. It lies below those that the system gives to outgoing connections, because one of them
/// could take it before its server does.
pub fn free() -> u16 {
    loop {
        let port = rand::random_range(20_000..30_000);
        if take(port) {
            return port;
        }
    }
}

/// The usual port, or a free one if somebody has it.
pub fn usual(port: u16) -> u16 {
    if take(port) { port } else { free() }
}

fn take(port: u16) -> bool {
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() && taken.insert(port)
}
