"""The federation: mailbox apps inside Flower, workers beside it, and the supervision of both.

Heavy work never runs inside a Flower app. Both apps move short, idempotent letters between
folders (`mailbox`, `dialogue`); `coordinator` and `worker` do the work in their own processes;
`serving` and `joining` keep all of these processes alive and end them together.
"""
