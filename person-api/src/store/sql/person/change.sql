-- Applies a merge patch to a person. No new version and no event when nothing differs.
--
-- Parameters: 1 cpf, 2 and 3 ids and versions of `If-Match` (null for any), 4 name, 5 whether the address changes,
-- 6 address, 7 date of birth, 8 status, 9 headers of the event or null. Null leaves name, date of birth and status as
-- they are.
--
-- The order is that of every write: the row locked, the version raised, the position taken. What is compared is what
-- is locked, so `unchanged` is true of the version that it names.
WITH target AS MATERIALIZED (
    SELECT * FROM person.person WHERE cpf = $1 FOR UPDATE
), wanted AS MATERIALIZED (
    SELECT coalesce($4, name) AS name, CASE WHEN $5 THEN $6 ELSE address END AS address,
           coalesce($7, date_of_birth) AS date_of_birth, coalesce($8, status) AS status
    FROM target
    WHERE ($2::uuid[] IS NULL OR (target.id, target.version) IN (SELECT * FROM unnest($2::uuid[], $3::bigint[])))
), person AS (
    UPDATE person.person
    SET name = wanted.name, address = wanted.address, date_of_birth = wanted.date_of_birth,
        status = wanted.status, version = target.version + 1
    FROM target, wanted
    WHERE person.id = target.id
      AND (target.name, target.address, target.date_of_birth, target.status)
          IS DISTINCT FROM (wanted.name, wanted.address, wanted.date_of_birth, wanted.status)
    RETURNING person.*
), event AS (
    INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers)
    SELECT 'person', id::text, version, 'person.changed',
           (SELECT row_to_json(body)
            FROM (SELECT person.id, person.cpf, person.name, person.address, person.date_of_birth,
                         person.created_at, person.status) body),
           $9::jsonb
    FROM person
    RETURNING position
)
-- The division is the guard that no write is stored without its event, as in add.sql.
SELECT target.id, target.version, EXISTS (SELECT FROM wanted) AS matches, person.version AS changed,
       1 / ((SELECT count(*) FROM event) = (SELECT count(*) FROM person))::int AS whole
FROM target LEFT JOIN person ON true
