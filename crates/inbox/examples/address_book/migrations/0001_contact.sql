-- The address book: everybody's name and address as they are now, from the person service's events alone.
CREATE TABLE contact (
    id      uuid PRIMARY KEY,
    name    text NOT NULL,
    address text
);
