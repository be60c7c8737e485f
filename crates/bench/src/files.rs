//! Writes a report to files.

use std::{fs, path::Path};

use anyhow::Context;

use super::{plot, report::Report};

/// Writes the page, the plots and the numbers into a folder.
pub(crate) fn write(report: &Report, folder: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let files = [
        (
            "RESULTS.md",
            format!(
                "# What `make bench` measured\n\n{}\n![goals](goals.svg)\n\n![rounds](rounds.svg)\n",
                report.page()
            ),
        ),
        ("results.json", report.json()?),
        ("goals.svg", plot::goals(report)),
        ("rounds.svg", plot::rounds(report)),
    ];
    for (name, text) in files {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Puts what `command` has measured where a page has the two marks for it: `<!-- make bench -->` and `<!-- /make bench -->`.
pub(crate) fn write_into(command: &str, new: &str, page: &Path) -> anyhow::Result<()> {
    let text = fs::read_to_string(page).with_context(|| format!("cannot read {}", page.display()))?;
    let text = between(&text, command, new);
    let text = text.with_context(|| format!("{} has not the marks of {command}", page.display()))?;
    fs::write(page, text).with_context(|| format!("cannot write {}", page.display()))
}

/// A page with something new between a command's marks.
fn between(page: &str, command: &str, new: &str) -> Option<String> {
    let (begin, end) = (format!("<!-- {command} -->"), format!("<!-- /{command} -->"));
    let (before, rest) = page.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}\n{new}{end}{after}"))
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_between_the_marks_is_replaced() {
        let page = "a\n<!-- make bench -->\nold\n<!-- /make bench -->\nz\n";
        let new = super::between(page, "make bench", "new\n").unwrap();
        assert_eq!(new, "a\n<!-- make bench -->\nnew\n<!-- /make bench -->\nz\n");
        assert_eq!(super::between("no marks", "make bench", "new"), None);
    }
}
