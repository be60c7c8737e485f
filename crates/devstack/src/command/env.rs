//! `devstack env`: the running stack's addresses, for a shell.

use anyhow::{Context, bail};

use crate::{
    folder,
    stack::{ADDRESSES, Addresses},
};

/// The addresses of the stack that runs in this checkout.
pub(super) fn running() -> anyhow::Result<Option<Addresses>> {
    let data = super::data()?;
    let Some(pid) = folder::running(&data) else { return Ok(None) };
    match std::fs::read_to_string(data.join(ADDRESSES)) {
        Ok(text) => Ok(Some(serde_json::from_str(&text).context("the running stack is of another build")?)),
        Err(_) => bail!("the stack of process {pid} is not ready yet, or is stopping"),
    }
}

/// Prints a line for each address.
pub fn run() -> anyhow::Result<()> {
    let Some(addresses) = running()? else {
        bail!("no stack runs in this checkout; start one with: make up")
    };
    let lines = addresses.variables().map(|(name, address)| format!("export {name}='{address}'\n"));
    crate::show(&lines.concat());
    Ok(())
}
