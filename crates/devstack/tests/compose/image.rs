//! The image: what its Dockerfile makes, and what the build gets.

use std::{
    collections::BTreeSet,
    path::{Component, Path, PathBuf},
};

use super::{Deploy, PROGRAMS, Problems, binary, root};

impl Deploy {
    /// The Dockerfile makes what the containers run.
    pub(super) fn image(&self, problems: &mut Problems) {
        let lines = || self.dockerfile.lines().map(str::trim).filter(|line| !line.starts_with('#'));
        for image in lines().filter_map(|line| line.strip_prefix("FROM ")) {
            problems.pinned(image.split(' ').next().unwrap());
        }
        let words: Vec<_> = lines().flat_map(str::split_whitespace).collect();
        for program in PROGRAMS {
            // The package of a program that is published has a prefix.
            let is = |package: &str| package.strip_prefix("rabbit-").unwrap_or(package) == program;
            let built = words.windows(2).any(|pair| pair[0] == "--package" && is(pair[1]));
            problems.unless(built, || format!("the Dockerfile does not build {program}"));
            let installed = words.contains(&format!("target/release/{program}").as_str());
            problems.unless(installed, || format!("the Dockerfile does not install {program}"));
        }
        problems.unless(words.contains(&"--locked"), || "the Dockerfile does not build with --locked".into());
        problems.unless(words.contains(&"--from=build"), || "the Dockerfile copies nothing".into());
        let user = lines().filter_map(|line| line.strip_prefix("USER ")).next_back();
        let root_user = user.is_none_or(|user| user.starts_with("root") || user.starts_with('0'));
        problems.unless(!root_user, || "the image runs as root".into());

        let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
        let members = manifest.split("members = [").nth(1).unwrap().split(']').next().unwrap();
        let members = members.lines().filter_map(|line| line.trim().strip_prefix('"')?.strip_suffix("\","));
        let sources = PROGRAMS.iter().flat_map(|program| sources(program));
        for path in
            members.map(str::to_owned).chain(["Cargo.toml", "Cargo.lock"].map(str::to_owned)).chain(sources)
        {
            problems.unless(self.sends(&path), || format!("the build does not see {path}"));
        }
    }

    /// Whether the build gets what is at `path`: nothing but what Dockerfile.dockerignore excepts, with what is in it.
    fn sends(&self, path: &str) -> bool {
        let all_but = self.ignored.lines().any(|line| line == "*");
        let mut excepted = self.ignored.lines().filter_map(|line| line.strip_prefix('!'));
        all_but
            && excepted.any(|sent| {
                path.strip_prefix(sent).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            })
    }
}

/// The files of this checkout that a program was built from, as Cargo has noted beside it: what is included at
/// compile time is among them.
fn sources(program: &str) -> BTreeSet<String> {
    let noted = std::fs::read_to_string(binary(program).with_extension("d")).unwrap();
    let (_, noted) = noted.split_once(": ").unwrap();
    let sources: BTreeSet<_> = noted.split_whitespace().filter_map(|path| inside(Path::new(path))).collect();
    assert!(sources.len() > 20, "{program} was built from another checkout: run `cargo build --workspace`");
    sources
}

/// A path without `..`, from the root of this checkout on.
fn inside(path: &Path) -> Option<String> {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(plain.pop()),
            part => plain.push(part),
        }
    }
    Some(plain.strip_prefix(root()).ok()?.to_str()?.to_owned())
}
