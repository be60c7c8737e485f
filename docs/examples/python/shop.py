"""A service that has orders, as it was before the outbox: SQLAlchemy 2, no version column, and not a word of events.

Its tables are those of ../sql/orders.sql. With ../sql/capture.sql, each transaction here publishes the orders that it
changed, bulk statements and deletions included.
"""

import os

from sqlalchemy import BigInteger, ForeignKey, Identity, create_engine, delete, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    status: Mapped[str] = mapped_column(default="open")
    lines: Mapped[list["Line"]] = relationship(passive_deletes=True)


class Line(Base):
    __tablename__ = "order_line"
    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id", ondelete="CASCADE"))
    item: Mapped[str]
    price: Mapped[int] = mapped_column(BigInteger)


def place(engine, **prices):
    with Session(engine) as session, session.begin():
        order = Order(lines=[Line(item=item, price=price) for item, price in prices.items()])
        session.add(order)
        session.flush()
        return order.id


def pay(engine, order_id):
    with Session(engine) as session, session.begin():
        order = session.get_one(Order, order_id)
        order.status = "paid"
        order.lines.append(Line(item="shipping", price=450))


def change_price(engine, item, by):
    """One statement, whose rows are of many orders."""
    with Session(engine) as session, session.begin():
        session.execute(update(Line).where(Line.item == item).values(price=Line.price + by))


def remove_cancelled(engine):
    """One statement; the database removes the lines."""
    with Session(engine) as session, session.begin():
        session.execute(delete(Order).where(Order.status == "cancelled"))


def main():
    url = os.environ["DATABASE_URL"]  # SQLAlchemy takes another driver unless the URL names it.
    engine = create_engine("postgresql+psycopg://" + url.split("://", 1)[1])
    pay(engine, place(engine, pen=700, ink=300))
    other = place(engine, ink=300, paper=500)
    change_price(engine, "ink", 25)
    with Session(engine) as session:
        session.get_one(Order, other).status = "lost"
        session.flush()
        session.rollback()  # Never published.
    with Session(engine) as session, session.begin():
        session.get_one(Order, place(engine, paper=500)).status = "cancelled"
    remove_cancelled(engine)


if __name__ == "__main__":
    main()
