-- Adds a person, as version 1 of its aggregate.
--
-- Parameters: 1 cpf, 2 name, 3 address, 4 date of birth, 5 caller, 6 route, 7 idempotency key or null, 8 digest of the
-- request's body, 9 location, 10 response body, 11 headers of the event or null.
WITH person AS (
    -- An existing cpf is no error of the database, whose log and message would name it: there is no row.
    INSERT INTO person.person (id, cpf, name, address, date_of_birth)
    VALUES (outbox.uuid7(), $1, $2, $3, $4)
    ON CONFLICT (cpf) DO NOTHING
    RETURNING *
), claim AS (
    INSERT INTO person.idempotency (caller, route, key, request, person_id, location, etag, body)
    SELECT $5, $6, $7, $8, id, $9, '"' || id || '.' || version || '"',
           replace(replace($10, '{id}', id::text), '{version}', version::text)
    FROM person WHERE $7::text IS NOT NULL
    ON CONFLICT DO NOTHING
    RETURNING person_id
), event AS (
    INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers)
    SELECT 'person', id::text, version, 'person.new',
           (SELECT row_to_json(body)
            FROM (SELECT person.id, person.cpf, person.name, person.address, person.date_of_birth,
                         person.created_at, person.status) body),
           $11::jsonb
    FROM person
    RETURNING position
)
-- The division is the guard that no write is stored without its event, and none with a key that another request took
-- meanwhile (for another cpf, or the cpf would have been there): it fails, and with it the whole statement.
SELECT id, version,
       1 / ((SELECT count(*) FROM event) = 1 AND ($7 IS NULL OR EXISTS (SELECT FROM claim)))::int AS whole
FROM person
