//! Every link of every page in this repository leads somewhere: to a file or a folder, and where it names a heading, to
//! that heading. Links to other sites are not followed.

#![expect(clippy::unwrap_used, reason = "a panic in a test is the report")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// The pages of a folder and of those below it. Links to folders are not followed, and what is built or hidden is none.
fn pages(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let (path, name) = (entry.path(), entry.file_name().into_string().unwrap());
        if entry.file_type().unwrap().is_dir() {
            if !name.starts_with('.') && name != "target" && name != "node_modules" {
                pages(&path, found);
            }
        } else if path.extension().is_some_and(|extension| extension == "md") {
            found.push(path);
        }
    }
}

/// A page without its blocks of code.
fn prose(text: &str) -> String {
    let mut fenced = false;
    let outside = |line: &&str| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        !fence && !fenced
    };
    text.lines().filter(outside).collect::<Vec<_>>().join("\n")
}

/// A line without what stands between backticks.
fn without_code(line: &str) -> String {
    line.split('`').step_by(2).collect::<Vec<_>>().join("`")
}

/// Where the links of a page lead to: `[text](here)`, and `[text]: here` at the begin of a line.
fn links(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in prose(text).lines().map(without_code) {
        let inline = line.split("](").skip(1).filter_map(|rest| rest.split([')', ' ']).next());
        found.extend(inline.map(str::to_owned));
        let definition = line.strip_prefix('[').and_then(|rest| rest.split_once("]: "));
        found.extend(definition.map(|(_, target)| target.trim().to_owned()));
    }
    found
}

/// The anchors of a page: its headings, as GitHub makes anchors of them.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for line in prose(text).lines() {
        let title = line.trim_start_matches('#');
        if title.len() == line.len() || !title.starts_with(' ') {
            continue;
        }
        // Of a link in a heading, the text counts.
        let shown: String = title.split("](").enumerate().fold(String::new(), |shown, (n, part)| {
            let part = if n == 0 { part } else { part.split_once(')').map_or("", |(_, rest)| rest) };
            shown + part
        });
        let kept = |c: &char| c.is_alphanumeric() || [' ', '-', '_'].contains(c);
        let slug = shown.trim().to_lowercase().chars().filter(kept).collect::<String>().replace(' ', "-");
        let mut anchor = slug.clone();
        let mut n = 0;
        while !found.insert(anchor) {
            n += 1;
            anchor = format!("{slug}-{n}");
        }
    }
    found
}

/// Why a link of a page leads nowhere; None when it does not.
fn broken(root: &Path, page: &Path, link: &str) -> Option<String> {
    if ["https://", "http://", "mailto:"].iter().any(|scheme| link.starts_with(scheme)) {
        return None;
    }
    let (path, anchor) = link.split_once('#').map_or((link, None), |(path, anchor)| (path, Some(anchor)));
    let target = if path.is_empty() { page.to_owned() } else { page.parent().unwrap().join(path) };
    let Ok(target) = target.canonicalize() else { return Some("there is no such file".to_owned()) };
    if !target.starts_with(root) {
        return Some("it leads out of the repository".to_owned());
    }
    let anchor = anchor?;
    if target.extension().is_none_or(|extension| extension != "md") {
        return Some("only pages have headings".to_owned());
    }
    let there = anchors(&fs::read_to_string(&target).unwrap());
    (!there.contains(anchor)).then(|| format!("there is no such heading; there are {there:?}"))
}

#[test]
fn every_link_leads_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap();
    let mut all = Vec::new();
    pages(&root, &mut all);
    all.sort();
    let (mut wrong, mut followed) = (Vec::new(), 0);
    for page in &all {
        let shown = page.strip_prefix(&root).unwrap().display();
        for link in links(&fs::read_to_string(page).unwrap()) {
            followed += 1;
            wrong.extend(broken(&root, page, &link).map(|why| format!("{shown}: {link}: {why}")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // The search itself works: there are some hundred.
    assert!(all.len() > 40 && followed > 300, "{} pages with {followed} links", all.len());
}

#[test]
fn links_and_headings_are_found() {
    let page = "# A `b` & c_d!\n[one](x.md#y), [`two`](z \"title\"), `[no](no)` ![three](i.svg)\n\
                ```sh\n# no heading\n[no](no)\n```\n## A [link](to)\n## A link\n[four]: https://example.com\n";
    assert_eq!(links(page), ["x.md#y", "z", "i.svg", "to", "https://example.com"]);
    assert_eq!(anchors(page).into_iter().collect::<Vec<_>>(), ["a-b--c_d", "a-link", "a-link-1"]);
}

/// Each document begins with the sentence that says who needs it.
#[test]
fn every_document_says_who_needs_it() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let mut all = Vec::new();
    pages(&docs, &mut all);
    // The bench writes this one.
    all.retain(|page| !page.ends_with("bench/RESULTS.md"));
    for page in all {
        let text = fs::read_to_string(&page).unwrap();
        let first = text.lines().skip(1).find(|line| !line.is_empty()).unwrap_or_default();
        let says = first.starts_with("This page is for ") || first.starts_with("These pages are for ");
        assert!(says, "{} begins with: {first}", page.display());
    }
}
