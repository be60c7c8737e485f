-- Locks a person before the deletion. Every write about the person waits for this lock.
--
-- Parameters: 1 cpf, 2 and 3 ids and versions of `If-Match` (null for any).
SELECT target.id, target.version,
       ($2::uuid[] IS NULL
        OR (target.id, target.version) IN (SELECT * FROM unnest($2::uuid[], $3::bigint[]))) AS matches
FROM person.person target WHERE cpf = $1 FOR UPDATE
