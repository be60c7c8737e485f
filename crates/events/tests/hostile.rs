//! Whatever stands in a body, parsing it ends, without a panic, and takes no more memory than some copies of the body. A
//! body that does not end keeps this test from ending.

#![expect(clippy::unwrap_used, reason = "a panic is the report of a test")]

use events::PersonEvent;

/// The longest body has 7 MB. A number that is written out from its exponent would take a gigabyte.
const MEMORY_KB: u64 = 200_000;

/// The most memory that this process has had so far.
fn peak_kb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim().trim_end_matches(" kB").parse().unwrap()
}

const ITEM: &str = r#"{"id":"0198c0de-0000-7000-8000-000000000002","person_id":"0198c0de-0000-7000-8000-000000000001","type":"renting","value":VALUE,"created_at":"2026-01-01T00:00:01+00:00","person":{"id":"0198c0de-0000-7000-8000-000000000001","cpf":CPF,"name":"abc","address":null,"date_of_birth":"2019-06-15T22:23:55+00:00","created_at":"2026-01-01T00:00:00+00:00"}}"#;

fn item(value: &str, cpf: &str) -> String {
    ITEM.replace("VALUE", value).replace("CPF", cpf)
}

#[test]
fn no_body_takes_the_reader_with_it() {
    let digits = "9".repeat(1_000_000);
    let zeros = format!("0.{}1", "0".repeat(1_000_000));
    let arrays = "[".repeat(1_000_000);
    let objects = r#"{"a":"#.repeat(1_000_000);
    let quotes = format!("\"{}\"", "\\u0000".repeat(1_000_000));
    let values = [
        "1e999999999",
        "-1e999999999",
        "1e-999999999",
        "0e999999999",
        "1e99999999999999999999",
        "1E+2147483648",
        "79228162514264337593543950336",
        "1e28",
        "1e29",
        &digits,
        &zeros,
        &arrays,
        &objects,
        &quotes,
        "NaN",
        "1e",
        "--1",
    ];
    let before = peak_kb();
    for value in values {
        let shown = value.get(..30).unwrap_or(value);
        for body in [item(value, "11111"), item("1", value), format!("{{\"id\":{value}}}"), value.to_owned()]
        {
            for type_ in ["income.new", "person.new", "person.deleted", "person.baseline", "of.later"] {
                if let Err(error) = PersonEvent::parse(type_, body.as_bytes()) {
                    assert!(error.to_string().len() < 200, "{type_} with {shown}: {error}");
                }
            }
            let taken = peak_kb() - before;
            assert!(taken < MEMORY_KB, "{shown}: {taken} kB");
        }
    }
    // What is exact is taken, however it is spelled.
    assert!(PersonEvent::parse("income.new", item("1e3", "11111").as_bytes()).is_ok());
}
