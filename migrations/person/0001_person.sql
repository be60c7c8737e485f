-- The person service's own tables. It shares none of them: others learn of a change by its event.

-- A person is an aggregate. `version` counts its events: 1, 2, 3, … without holes, raised under the
-- row's lock in the transaction that writes the event. The id, not the cpf, names the aggregate to
-- others: a cpf that is deleted and created again is another life with another id.
CREATE TABLE person.person (
    id            uuid        PRIMARY KEY,
    cpf           bigint      NOT NULL UNIQUE CHECK (cpf BETWEEN 1 AND 99999999999),
    name          text        NOT NULL,
    address       text,
    date_of_birth timestamptz NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    version       bigint      NOT NULL DEFAULT 1 CHECK (version >= 1)
) WITH (fillfactor = 90);

-- What a person earns, owns and owes. One table per kind, as each is a record type of its own in the
-- event contract. Values are exact: 15 digits before the point, 4 after it.
CREATE TABLE person.income (
    id         uuid          PRIMARY KEY,
    person_id  uuid          NOT NULL REFERENCES person.person (id) ON DELETE CASCADE,
    type       text          NOT NULL,
    value      numeric(19,4) NOT NULL CHECK (value >= 0 AND value <> 'NaN'),
    created_at timestamptz   NOT NULL DEFAULT now()
);
CREATE TABLE person.asset (
    id         uuid          PRIMARY KEY,
    person_id  uuid          NOT NULL REFERENCES person.person (id) ON DELETE CASCADE,
    type       text          NOT NULL,
    value      numeric(19,4) NOT NULL CHECK (value >= 0 AND value <> 'NaN'),
    created_at timestamptz   NOT NULL DEFAULT now()
);
CREATE TABLE person.debt (
    id         uuid          PRIMARY KEY,
    person_id  uuid          NOT NULL REFERENCES person.person (id) ON DELETE CASCADE,
    value      numeric(19,4) NOT NULL CHECK (value >= 0 AND value <> 'NaN'),
    created_at timestamptz   NOT NULL DEFAULT now()
);

-- A person's items in the order in which they came; ids are UUIDv7, so they follow time.
CREATE INDEX income_person ON person.income (person_id, id);
CREATE INDEX asset_person  ON person.asset  (person_id, id);
CREATE INDEX debt_person   ON person.debt   (person_id, id);

-- What the API needs and no more. (Its right to append events: outbox.grant_writer.)
CREATE FUNCTION person.grant_api(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA person TO %s', role);
    EXECUTE format('GRANT SELECT ON person.migration TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON person.person, person.income, person.asset, person.debt TO %s', role);
END
$$;
