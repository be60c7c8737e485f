//! Free ports on 127.0.0.1.

use std::{
    collections::BTreeMap,
    io,
    net::{Ipv4Addr, TcpListener},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener},
    },
    sync::{Mutex, PoisonError},
};

/// Ports that this process has given away: a server that restarts finds its own free again, and other processes give
/// away none of them meanwhile, by what is kept with each.
static TAKEN: Mutex<BTreeMap<u16, UnixListener>> = Mutex::new(BTreeMap::new());

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
    if taken.contains_key(&port) || TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err() {
        return false;
    }
    claim(port).map(|claim| taken.insert(port, claim)).is_ok()
}

/// A name that one process has at a time, until it ends; nothing of it is on a disk.
fn claim(port: u16) -> io::Result<UnixListener> {
    UnixListener::bind_addr(&SocketAddr::from_abstract_name(format!("devstack-port-{port}"))?)
}
