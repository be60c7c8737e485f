//! The login.

use maud::{Markup, html};

use crate::page::Page;

/// The form. `to` is where the operator wanted to go; `failed`: the last try did not succeed.
pub fn page(to: &str, failed: bool) -> Page {
    Page::still("Log in", form(to, failed))
}

fn form(to: &str, failed: bool) -> Markup {
    html! {
        section #login {
            @if failed {
                p role="alert" { "This key is not known, or has no role. Roles stand in the table [role] of the console's file." }
            }
            form.act method="post" action="/login" {
                input type="hidden" name="to" value=(to);
                label { "Key" input name="key" type="password" required autocomplete="current-password" autofocus; }
                button { "Log in" }
            }
        }
    }
}

/// A page of this console to go to after the login; the first one where `to` is none.
pub fn target(to: &str) -> &str {
    let is_ours = to.starts_with('/')
        && !to.starts_with("//")
        && !to.contains('\\')
        && to.bytes().all(|byte| byte.is_ascii_graphic());
    if is_ours { to } else { "/" }
}

#[cfg(test)]
mod tests {
    use super::target;

    #[test]
    fn nobody_is_sent_to_another_site() {
        for to in ["/", "/outbox/person?x=1", "/find?q=a%2Fb"] {
            assert_eq!(target(to), to);
        }
        for to in
            ["", "//evil.example", "/\\evil.example", "https://evil.example", "evil", "/a\r\nb", "/\t/evil"]
        {
            assert_eq!(target(to), "/", "{to:?}");
        }
    }
}
