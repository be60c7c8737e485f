//! What an error of the broker means, in words that may be shown to anybody.

use lapin::{
    Error, ErrorKind,
    protocol::{AMQPErrorKind, AMQPSoftError},
};

/// What happened, with the broker's words where it has said something, but without the names of users; and what to
/// do where the words mislead.
///
/// ```
/// # async fn example(connection: &amqp::Connection) {
/// if let Err(error) = connection.create_channel().await {
///     println!("no channel: {}", amqp::describe(&error));
/// }
/// # }
/// ```
pub fn describe(error: &Error) -> String {
    let ErrorKind::ProtocolError(amqp) = error.kind() else {
        return error.to_string();
    };
    let said = without_users(amqp.get_message().as_str());
    // Only a login is refused with this code before there is a channel, in whatever words.
    if matches!(amqp.kind(), AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED)) && said.contains("Login") {
        return format!(
            "{said} Check the user and the password of the URL. RabbitMQ refuses logins also while it cannot work, \
             as with a full disk: its log says so"
        );
    }
    said
}

/// The broker's words without the names of users, which come in quotation marks: `user 'shop'` becomes
/// `this user`.
///
/// ```
/// assert_eq!(amqp::without_users("refused for user 'shop'"), "refused for this user");
/// ```
pub fn without_users(said: &str) -> String {
    const USER: &str = "user '";
    let (mut text, mut rest) = (String::new(), said);
    while let Some((before, quoted)) = rest.split_once(USER) {
        let Some((_, after)) = quoted.split_once('\'') else { break };
        text += before;
        text += "this user";
        rest = after;
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_not_named() {
        for (said, shown) in [
            ("vhost shop not found", "vhost shop not found"),
            (
                "NOT_ALLOWED - access to vhost '/' refused for user 'shop'",
                "NOT_ALLOWED - access to vhost '/' refused for this user",
            ),
            (
                "access to topic 'a' in exchange 'e' in vhost '/' refused for user 'a b', user 'c': limit (0)",
                "access to topic 'a' in exchange 'e' in vhost '/' refused for this user, this user: limit (0)",
            ),
            ("refused for user 'shop", "refused for user 'shop"),
        ] {
            assert_eq!(without_users(said), shown);
        }
    }
}
