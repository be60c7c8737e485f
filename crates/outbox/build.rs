//! A new migration is part of the program: cargo does not see a new file by itself.

fn main() {
    println!("cargo:rerun-if-changed=migrations");
}
